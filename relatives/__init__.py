"""The methods that PretrainZero is compared with and that need more than a few lines, one file each."""
