"""`python -m latentcodec`: the same as the command `latentcodec`."""

from latentcodec.cli import main

if __name__ == "__main__":  # a worker process imports this file again
    main()
