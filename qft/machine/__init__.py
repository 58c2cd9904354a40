"""What this machine is, and how its libraries are kept quiet."""
