"""What the stage scripts share: the argument groups, each of which can build what its flags describe."""
