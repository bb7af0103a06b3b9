import sys

from miniature.runs import main

main(sys.argv[1:])
