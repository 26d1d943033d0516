"""Which images, and what is a right answer? The entry points are `splits.load_data` and `metric.load_metric`."""
