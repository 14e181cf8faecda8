"""`python -m drift_merge` is `drift-merge`."""

from drift_merge.cli.merge import main

if __name__ == "__main__":
    main()
