"""What was measured: the document, and its views."""
