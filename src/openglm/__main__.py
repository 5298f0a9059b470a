"""`python -m openglm` is `glm`; and what torchrun starts: `torchrun --nproc-per-node 2 -m openglm train RECIPE.toml`."""

from openglm.cli.main import main

if __name__ == "__main__":
    main()
