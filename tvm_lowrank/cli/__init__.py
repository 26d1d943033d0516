"""What does a user type? The entry point is `app.main`."""
