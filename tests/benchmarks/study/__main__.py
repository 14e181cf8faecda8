"""python -m tests.benchmarks.study; its processes cannot import a module of this name."""

from tests.benchmarks.study.runs import main

if __name__ == "__main__":
    main()
