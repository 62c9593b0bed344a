"""What every room needs and no domain owns. Imports nothing of the other rooms."""
