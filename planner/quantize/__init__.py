"""How a whole model gets its codes: block by block, learned, distilled."""
