#!lua flags=allow-oom
-- include keys.lua
-- include fence_trainer.lua
-- ARGV[3..]: entry ids. Frees memory, so it runs when memory is full. The record in seen:groups stays.
local done = 0
for i = 3, #ARGV do
  done = done + redis.call('XACK', K.groups, 'trainer', ARGV[i])
  redis.call('XDEL', K.groups, ARGV[i])
end
return {'ok', done}
