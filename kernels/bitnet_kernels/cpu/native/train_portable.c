#define TABLE bn_training_portable
#include "train.inc.h"
