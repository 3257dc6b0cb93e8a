"""Families of problems: one file draws one kind of instance and works it out. See problems.py for who asks and how."""
