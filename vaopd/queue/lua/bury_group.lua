#!lua flags=allow-oom
-- include keys.lua
-- include fence_trainer.lua
-- Moves a group to the dead letters. ARGV: 3 id, 4 dedupe key, 5 DeadLetter. Moves as many bytes as it frees, hence allow-oom.
-- An entry that is gone was buried by this very call, whose reply was lost.
if redis.call('XACK', K.groups, 'trainer', ARGV[3]) == 1 then
  redis.call('XADD', K.dead, '*', 'key', ARGV[4], 'letter', ARGV[5])
  redis.call('XDEL', K.groups, ARGV[3])
end
return {'ok'}
