"""`python -m thought_kernels`: the command line."""

from thought_kernels.cli import main

if __name__ == "__main__":
    main()
