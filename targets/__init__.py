"""Which devices are there, and what do they need? The entry point is `profile.load_profile`."""
