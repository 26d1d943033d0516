"""How long would it take? The entry point is `times.SiteTimes`: measured where it matters, predicted elsewhere."""
