"""Times whole searches beside the program that one would write first."""
