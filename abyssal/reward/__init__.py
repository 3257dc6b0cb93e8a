"""Text -> number, without torch. A reward is any function (problem, message) -> Score.

verifiers.py finds the one that a problem names; math_answer.py, instruction.py and form.py hold ours.
"""
