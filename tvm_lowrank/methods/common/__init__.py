"""What holds for the chains of any method: their scales, the norm of the loss, an exact last factor."""
