"""Documents as people read them: in the terminal and as HTML."""
