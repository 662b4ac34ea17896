"""What a part of the network is: the weights, hook points and inner parts that it declares."""
