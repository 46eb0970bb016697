"""Does tracing say where to edit?"""
