"""`python -m hooklens.harness --model hooklens --model_args pretrained=...`: the harness' command line."""

from hooklens.harness.command import main

if __name__ == "__main__":
    main()
