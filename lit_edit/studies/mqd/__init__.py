"""What does the kind of question do to sequential editing?"""
