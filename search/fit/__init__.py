"""How does a decomposed network become good?

The entry points are `refit.refit`, `reconstruct.reconstruct_if_better` and `finetune.finetune`, each going on from the
one before.
"""
