"""What each command does: reads its arguments, calls the part that does the work, prints. Side effects stand here."""
