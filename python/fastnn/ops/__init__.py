"""One file a family: the checks, the choice of backend, autograd, and the registration with torch.library."""
