"""What strangers can do to those who are served: each attack beside a bystander, its effect measured."""
