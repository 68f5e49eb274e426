"""The measured objects: layers, blocks and models with all methods of adaptation, and single operators."""
