from play.passage import main

main()
