#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pages", 0, -1, 0};
PyMODINIT_FUNC PyInit__pages(void) { return PyModule_Create(&module); }
