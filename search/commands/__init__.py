"""What does a user call? Each command has a file; `inputs.load` is where all of them begin, `deliver` where bundles end."""
