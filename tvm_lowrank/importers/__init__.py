"""How does a model become one Relax function with named sites? The entry point is `importer.import_model`."""
