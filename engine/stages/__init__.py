"""The stages of a recipe, one file each: `run(context, config)` turns declared inputs into declared outputs."""
