"""What this machine is, and how its libraries are set up."""
