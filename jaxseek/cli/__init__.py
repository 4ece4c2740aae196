"""The command line: main.py parses and dispatches; each verb has a file that declares and runs it."""
