"""The small op set that the model is written against: base.py says what it is, each other file is one way."""
