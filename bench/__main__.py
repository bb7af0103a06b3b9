from bench.step import main

main()
