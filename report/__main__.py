from report.page import main

main()
