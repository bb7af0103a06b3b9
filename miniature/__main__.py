from miniature.runs import main

main()
