"""Which plan? The entry point is `loop.Search`: damages and times in, evaluated plans out."""
