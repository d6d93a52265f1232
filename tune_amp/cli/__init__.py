"""The commands: arguments, calls and printing. The only room that prints."""
