"""Which plan? What is known is a `search.Search`, and `loop` walks over its plans to those that keep the budget."""
