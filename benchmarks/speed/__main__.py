"""``python -m benchmarks.speed <workload>``"""

from benchmarks.speed.run import main

if __name__ == "__main__":
    main()
