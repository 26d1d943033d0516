"""What does a user call? Each command has a file. All begin with `inputs.load`; bundles are written by `deliver`."""
