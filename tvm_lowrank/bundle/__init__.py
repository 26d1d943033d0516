"""What is shipped, and how is it run, checked and explained? The entry point is `library.load`."""
