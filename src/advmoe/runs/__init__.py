"""What one does with a run: its status, and its network loaded, evaluated, used and counted."""
