"""Pictures of results. A program draws its own after a run; bench.report draws all again."""
