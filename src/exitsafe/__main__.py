"""`python -m exitsafe`, as `accelerate launch -m exitsafe` needs it."""

from exitsafe.cli.main import main

if __name__ == "__main__":
    main()
