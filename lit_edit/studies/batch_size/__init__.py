"""Does it matter in how large steps edits are made?"""
