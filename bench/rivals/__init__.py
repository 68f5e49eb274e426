"""What is measured: a layer and a model adapted in every way one might, and single operators."""
